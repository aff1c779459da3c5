"""Parameters that lie in shards on several processes.

LAMB's ratio needs norms over whole tensors. Backends work on local tensors and the sums of their parts; between the two phases
of a step these are added over the processes that hold the other parts. `layout` knows where the parts of one tensor lie,
`place` where its elements do in the whole tensor, and `sums` adds over processes. No other room imports torch.distributed, and
this one only once somebody else has made a DTensor. It must not know of options or of the rule.
"""
