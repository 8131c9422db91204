//! Generates the ttrpc client and server of `proto/agent.proto`, and the messages of `proto/cri.proto`.

#[cfg(feature = "rpc")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

    for file in ["agent", "cri"] {
        println!("cargo::rerun-if-changed=proto/{file}.proto");
    }
    Codegen::new()
        .out_dir(std::env::var("OUT_DIR")?)
        .inputs(["proto/agent.proto", "proto/cri.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize {
            async_all: true,
            gen_mod: false,
            ..Default::default()
        })
        .run()?;
    // One file to include: inner attributes are not allowed there, so each module comes by path.
    let dir = std::env::var("OUT_DIR")?;
    let module = |name: &str| format!("#[path = \"{dir}/{name}.rs\"]\npub mod {name};\n");
    std::fs::write(
        format!("{dir}/mod.rs"),
        module("agent") + &module("agent_ttrpc") + &module("cri"),
    )?;
    Ok(())
}

#[cfg(not(feature = "rpc"))]
fn main() {}
