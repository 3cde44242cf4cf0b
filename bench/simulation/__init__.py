"""A swarm on virtual time: the decisions are the project's own code, machines and links are made up."""
