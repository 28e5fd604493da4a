"""The dress rehearsal: any rank of a run of any size takes its steps on one CPU, with tensors that have no data.

rehearse    one rank's rehearsal, from beginning to end
record      what a rank did: its events in order, and its memory
recorder    writes the record while the rank runs, a rehearsed one or a real one
world       a process group without other ranks, and tensors without data; device, expected: what stands in for the device
memory      what was allocated and freed; components: what it is for; allocator, snapshot: how it lies in the device's memory
places      names of lines and of parts of a step
choice      which ranks stand for the others
"""
