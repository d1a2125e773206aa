"""Visual commonsense reasoning: config, samples, job, evaluation, page."""
