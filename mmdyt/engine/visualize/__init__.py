"""Pictures of which tokens ran where."""
