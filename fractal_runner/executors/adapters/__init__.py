"""Executors over the engines of others: their workers, our contract. Each needs its extra."""
