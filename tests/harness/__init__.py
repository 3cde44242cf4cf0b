"""Real swarms for tests: in one process, or as processes that can be killed."""
