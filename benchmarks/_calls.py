"""The functions of calls that are measured, apart: whoever runs one imports its module."""


def nothing(number: int) -> int:
    """Do nothing."""
    return number
