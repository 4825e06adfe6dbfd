"""What is submitted: trainings, other commands, arrays, sweeps; and how a run goes on after its job."""
