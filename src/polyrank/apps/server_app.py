"""polyrank's Flower ServerApp: a recipe's rounds, carried out by clients on their own machines."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from polyrank.apps.grid_post import GridPost
from polyrank.apps.serving import serve
from polyrank.config.flower import app_settings, from_run_config

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry out the recipe of the run config; see `polyrank.apps.serving.serve`."""
    recipe, settings = from_run_config(context.run_config), app_settings(context.run_config)
    serve(recipe, settings, GridPost(grid), str(context.run_id))
