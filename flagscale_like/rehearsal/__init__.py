"""The dress rehearsal: any rank of a run of any size takes its steps on one CPU, with tensors that have no data.

record      what a rank did: its events in order, and its memory
recorder    writes the record while the rank runs, a rehearsed one or a real one
"""
