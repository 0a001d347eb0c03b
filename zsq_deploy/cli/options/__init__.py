"""The options of the commands as annotated types, each said once. The words are those of a recipe.

``common``: the network, the images, the run; ``quantize``: what is built; ``verify``: what it is judged on; ``devices``: devices.
"""
