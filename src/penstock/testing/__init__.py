"""Tools to test policies, schedulers and servers without a model.  Part of the product."""

from penstock.testing.scripted import PlanError, ScriptedEngine

__all__ = ["PlanError", "ScriptedEngine"]
