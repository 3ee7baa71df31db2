"""Executors over the engines of others: their workers, our contract."""
