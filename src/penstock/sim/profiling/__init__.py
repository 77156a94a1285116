"""Profiles of step times from measurements: of an endpoint from outside, or of recorded steps."""
