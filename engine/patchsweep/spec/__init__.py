"""Defines a sweep: sites, interventions, metrics, batches, the plan. Runs no model."""
