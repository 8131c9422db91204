//! Manifests, indexes, image configurations, platforms and names.
#![no_main]

use casemate_image::fuzz;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzz::oci_image_config(bytes));
