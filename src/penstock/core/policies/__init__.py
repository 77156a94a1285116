"""The five questions.  A policy answers some of them; a preset names a composition."""
