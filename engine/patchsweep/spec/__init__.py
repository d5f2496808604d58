"""What a sweep is: sites, interventions, metrics, batches, the plan. Runs nothing."""
