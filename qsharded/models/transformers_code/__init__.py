"""Causal language models as transformers' own modelling code computes them. Needs the extra ``transformers``."""
