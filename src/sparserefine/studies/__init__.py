"""What refinement is worth and costs: scores, timings, the demo."""
