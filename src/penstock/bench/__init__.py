"""Workloads, a load generator for OpenAI endpoints, goodput, reports.  Never imports torch."""
