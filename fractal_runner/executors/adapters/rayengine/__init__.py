"""Calls through Ray: what waits (`calls`), the connection to Ray (`instance`), what runs there (`worker`)."""
