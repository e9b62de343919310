"""What the project needs of a Ray cluster: a session, its nodes and resources, tasks and jobs."""
