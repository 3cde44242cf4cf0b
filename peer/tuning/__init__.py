"""Fine-tuning as a job: records in, what was learnt out."""
