"""PEP 3148 executors, and their names. They know nothing of workflows."""
