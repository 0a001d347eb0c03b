"""The parts that synthesis papers share: losses, image priors, parametrisations, schedules, seeds.

A paper in :mod:`zsq_deploy.calib.methods` wires these up and adds nothing but its published values.
"""
