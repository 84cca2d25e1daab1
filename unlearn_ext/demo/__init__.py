"""The main job on embedded data: train a small classifier, make it forget, compare it to a retrained one."""
