"""Studies of several runs: what `python -m train.sweep` is made of.

sweep_settings (what gin sets) -> arms (what is varied, checked) -> study (folders, what is done) -> launching (local
processes, Ray, SLURM), each run by `running` -> board (seen while it goes on) -> statistics -> report
"""
