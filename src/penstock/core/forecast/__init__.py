"""Forecasts: output lengths from the past, KV occupancy of the future, step times, waits."""
