"""Time inference: variants of a model beside each other, and what they really ran."""
