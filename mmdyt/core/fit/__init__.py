"""What is set from data without training: thresholds and capacities, gates, mean updates."""
