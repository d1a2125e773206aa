"""Finetune and evaluate GuessWhat: config, games, the guesser and the oracle."""
