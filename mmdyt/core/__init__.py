"""The method, on torch alone: readable without knowing OpenMMLab."""
