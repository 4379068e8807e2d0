"""``gpu-check``: all that only a GPU can tell, in one command of under eight minutes, written as JSON and as a page.

``sections`` measures and checks, ``runner`` gives each section its time and a process of its own, ``page`` writes
what came of it. With ``--backend emulated`` all of it runs on the CPU, so that all of it is tested.
"""
