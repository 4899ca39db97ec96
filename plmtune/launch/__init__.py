"""Runs on many processes: started here, submitted to Slurm, or written as a file for SkyPilot or Kubernetes."""
