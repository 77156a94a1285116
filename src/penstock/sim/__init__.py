"""The simulator: the production scheduler under a virtual clock."""
