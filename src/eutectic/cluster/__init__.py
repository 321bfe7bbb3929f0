"""Machines of a Ray cluster, and units of work spread over them. Ray is imported here alone."""
