//! What the agent parses: requests, specs, processes, resources; seccomp profiles and device rules are compiled on the way.
#![no_main]

use casemate_agent::{check_process, check_resources, check_spec};
use casemate_protocol::agent::{CreateContainerRequest, ExecRequest, UpdateRequest};
use libfuzzer_sys::fuzz_target;
use protobuf::Message as _;

fuzz_target!(|data: &[u8]| {
    if let Ok(request) = CreateContainerRequest::parse_from_bytes(data) {
        let _ = check_spec(&request.id, &request.spec_json);
    }
    if let Ok(request) = ExecRequest::parse_from_bytes(data) {
        let _ = check_process(&request.process_json);
    }
    if let Ok(request) = UpdateRequest::parse_from_bytes(data) {
        let _ = check_resources(&request.resources_json);
    }
    // Without a frame around them the fuzzer gets deeper.
    let _ = check_spec("c1", data);
    let _ = check_process(data);
    let _ = check_resources(data);
});
