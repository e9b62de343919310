"""Ray clusters: sessions, nodes, resources, tasks and jobs."""
