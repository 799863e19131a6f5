"""The scored benchmark of whole models: what is trained, how it is scored, and what the paper's claims are worth.

`tiers` says what is trained, `stages` trains it with d2it's own stages, `scores` measures, `verdicts` judges, `report`
writes docs/evidence.md and the plots.
"""
