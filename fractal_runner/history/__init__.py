"""The durable record of runs: what was asked for, what has happened, and who may write it."""
