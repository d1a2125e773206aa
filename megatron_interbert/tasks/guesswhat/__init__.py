"""Finetune and evaluate GuessWhat: config, games, the guesser, the oracle, their evaluations."""
