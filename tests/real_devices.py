"""The tests that ``REPLICAX_TEST_DEVICES=real`` leaves out, see ``conftest.py``."""

from __future__ import annotations

import os

import jax

#: Whether the tests run on the devices of this machine.
REAL = os.environ.get("REPLICAX_TEST_DEVICES") == "real"

#: Files of tests that start processes with simulated devices, or that set the devices.
OWN_PROCESSES = (
    "test_compat_runner.py",
    "test_cpu_threads.py",
    "test_faults.py",
    "test_initialize.py",
    "test_jobs.py",
    "test_launch.py",
    "test_processes.py",
    "test_ray.py",
)

#: Files of tests that need eight devices.
FILES_FOR_EIGHT = ("test_compat_replicas.py", "test_outside.py", "test_shard_maps.py", "test_wire.py")

#: Tests that need eight devices, by file: they compare with ``jax.pmap``, or expect what there is only with several
#: devices, such as a layout over them, or transfers between them.
FOR_EIGHT = {
    "test_accepted.py": (
        "test_devices_that_do_not_go_together_are_explained",
        "test_devices_that_do_not_go_together_for_a_map_on_all",
        "test_in_axes_may_have_entries_for_arguments_that_are_left_out_where_some_are_static",
    ),
    "test_aot.py": (
        "test_compiled_for_types_and_called_like_the_map",
        "test_donated_arguments_are_taken",
        "test_shapes_without_compiling",
    ),
    "test_arguments.py": (
        "test_a_donated_argument_may_still_be_being_computed",
        "test_a_donated_argument_that_had_to_move_is_freed_before_the_program_runs",
        "test_one_array_donated_and_passed_again",
    ),
    "test_cache.py": ("test_a_signature_is_traced_once",),
    "test_callbacks.py": (
        "test_an_exception_without_text",
        "test_an_io_callback_that_several_replicas_of_a_device_cannot_make_is_refused_by_name",
        "test_no_part_of_a_failed_run_is_handed_out",
        "test_runs_that_nobody_waits_for_are_kept_apart",
    ),
    "test_clients.py": ("test_client",),
    "test_collectives.py": ("test_jax_pmap_agrees_where_it_works",),
    "test_compat.py": (
        "test_a_state_of_four_devices_goes_to_eight",
        "test_device_put_replicated",
        "test_device_put_sharded",
        "test_errors",
        "test_its_derivative_is_jaxs",
        "test_out_axes_none_does_not_ask_whether_replicas_agree",
        "test_weak_types_stay_weak",
        "test_what_is_put_on_devices_stays_there",
    ),
    "test_derivatives.py": (
        "test_cotangents_of_rules_on_any_number_of_devices",
        "test_results_equal_in_all_replicas",
    ),
    "test_dispatch.py": (
        "test_a_warm_call_of_arrays_in_place_has_no_frame_of_pythons",
        "test_devices_that_are_one_cpu_share_what_all_of_them_get",
    ),
    "test_errors.py": ("test_fault[two bits, padded]", "test_fault[too late for other devices]"),
    "test_hlo.py": (
        "test_a_branch_that_asks_for_its_index_alone_is_still_a_choice",
        "test_a_reduction_over_many_replicas_sends_one_replicas_bytes",
        "test_all_gather_sends_each_replica_once",
        "test_lanes_compile_to_the_program_by_hand",
        "test_one_replica_a_device_compiles_to_the_program_by_hand",
        "test_the_sum_of_a_tree_is_one_collective",
    ),
    "test_inputs.py": (
        "test_an_array_that_lies_right_is_not_moved_whatever_its_mesh_is_called",
        "test_arguments_may_lie_anywhere",
        "test_broadcast_arguments_may_lie_anywhere",
        "test_closed_over_arrays_may_lie_anywhere",
        "test_the_result_is_one_array_over_the_devices",
    ),
    "test_lanes.py": (
        "test_gradients_are_added_up_and_communicated_once",
        "test_options_of_the_map",
        "test_the_report_of_a_program",
        "test_tune_has_nothing_to_choose_with_one_replica_a_device",
    ),
    "test_layout.py": (
        "test_every_replica_has_a_lane_and_no_device_idles_without_need",
        "test_replica_r_is_lane_r_mod_l_of_device_r_over_l",
        "test_the_examples_of_the_documentation",
    ),
    "test_nested.py": (
        "test_a_sum_over_both_levels_is_one_reduction",
        "test_devices_are_factored_over_the_levels",
        "test_maps_of_maps_send_each_device_its_part_and_nothing_between_them",
        "test_what_goes_from_map_to_map_stays_on_its_devices",
    ),
    "test_placement.py": ("test_arguments_from_anywhere",),
    "test_replicas.py": (
        "test_fetch_of_any_placement",
        "test_replicate_onto_all_devices_or_some",
        "test_shard",
        "test_unreplicate_reads_any_placement",
    ),
    "test_report.py": (
        "test_all_replicas_on_every_device",
        "test_another_axis",
        "test_big_array",
        "test_groups_of_replicas_on_several_devices",
        "test_keys",
        "test_many_devices",
        "test_one_device",
        "test_one_replica_a_device",
        "test_only_a_few_values_leave_a_device",
        "test_prints_to_stdout_and_returns_nothing",
        "test_replicas_divided_among_devices",
        "test_several_replicas_a_device",
        "test_within_a_mesh_of_the_users",
    ),
    "test_signature.py": (
        "test_a_mesh_that_the_user_has_set_is_put_aside",
        "test_devices_and_backend",
        "test_donated_buffers_are_taken_and_others_are_not",
    ),
    "test_sweep.py": ("test_derivative_rules_that_communicate",),
}

#: Tests about CPU devices: their name, how arrays get to them, or how long programs take.
FOR_CPUS = {
    "test_dispatch.py": ("test_several_threads_copy_a_large_array",),
    "test_lanes.py": ("test_tune_finds_that_one_replica_in_many_does_all_the_work",),
    "test_report.py": ("test_dtypes",),
}


def files_left_out() -> tuple[str, ...]:
    """The files to ignore."""
    return OWN_PROCESSES + (FILES_FOR_EIGHT if jax.device_count() < 8 else ())


def why_not(file: str, case: str, test: str) -> str | None:
    """Why a case of a test is skipped; None if it runs."""
    found = {case, test}
    if jax.device_count() < 8 and found & {*FOR_EIGHT.get(file, ())}:
        return f"needs eight devices, and there are {jax.device_count()}"
    if jax.default_backend() != "cpu" and found & {*FOR_CPUS.get(file, ())}:
        return f"is about CPU devices, and these are of {jax.default_backend()}"
    return None


def unknown(file: str, tests: set[str]) -> list[str]:
    """The names in the tables that no test of the file has."""
    return sorted({*FOR_EIGHT.get(file, ()), *FOR_CPUS.get(file, ())} - tests)
