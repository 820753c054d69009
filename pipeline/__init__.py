"""The stages of a build as plain functions: one stage, one file, one public function. Runs without Prefect."""
