"""GLUE on the text path: config, samples, job, evaluation."""
