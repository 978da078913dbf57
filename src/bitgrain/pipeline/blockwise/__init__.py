"""The calibrated job: a model's blocks one after the other, each with the activations of what lies before it.

batches.py   calibration batches on their way through the blocks, and threads that give the same bits in any number
stages.py    which matrices of a block read the same input, in which order, and which write into the residual stream
gather.py    moments of the inputs of one stage
block.py     one block: transforms, then its stages, each solved and put in place before the next is measured
job.py       all blocks, resumable; then tuning, and the files
"""
