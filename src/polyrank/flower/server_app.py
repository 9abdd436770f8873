"""polyrank's Flower ServerApp: a recipe's rounds, carried out by clients on their own machines."""

from __future__ import annotations

from contextlib import nullcontext

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from polyrank.aggregation import code_allowed
from polyrank.config.app import app_settings
from polyrank.config.flower import from_run_config
from polyrank.flower.grid_channel import GridChannel
from polyrank.remote.server import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry out the recipe of the run config; see `polyrank.remote.server.serve`."""
    settings = app_settings(context.run_config)
    with code_allowed(settings.allow_code) if settings.allow_code else nullcontext():
        recipe = from_run_config(context.run_config)
        serve(recipe, settings, GridChannel(grid), str(context.run_id))
