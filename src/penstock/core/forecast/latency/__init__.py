"""How long a step takes: models behind one interface, and fits of them to measured steps."""
