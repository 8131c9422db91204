//! A real registry behind TLS with a certificate of its own authority.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::common::images::{Blobs, Packing, layer};
use crate::common::server::Server;
use crate::common::{run, runtime};
use casemate_image::{
    Error, Limits, PullOptions, PullPolicy, RegistryConfig, RegistryHost, Store, parse_reference,
};

struct Registry(Child);

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn pull_over_tls_needs_the_authority_to_be_trusted() {
    let work = tempfile::tempdir().unwrap();
    let path = |name: &str| work.path().join(name).to_str().unwrap().to_owned();
    let address = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let (authority, key, request, certificate) = (
        path("ca.pem"),
        path("key.pem"),
        path("csr.pem"),
        path("cert.pem"),
    );
    std::fs::write(
        path("ext"),
        "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth\n",
    )
    .unwrap();
    let new_key = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ];
    let with = |arguments: &[&str]| run("openssl", arguments);
    with(
        &[
            &["req", "-x509", "-days", "2", "-subj", "/CN=test authority"],
            &new_key[..],
            &["-keyout", &path("ca.key"), "-out", &authority],
        ]
        .concat(),
    );
    with(
        &[
            &["req", "-subj", "/CN=127.0.0.1"],
            &new_key[..],
            &["-keyout", &key, "-out", &request],
        ]
        .concat(),
    );
    with(&[
        "x509",
        "-req",
        "-days",
        "2",
        "-in",
        &request,
        "-CA",
        &authority,
        "-CAkey",
        &path("ca.key"),
        "-CAcreateserial",
        "-extfile",
        &path("ext"),
        "-out",
        &certificate,
    ]);
    let config = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
         http:\n  addr: {address}\n  tls: {{certificate: {certificate}, key: {key}}}\n",
        path("registry"),
    );
    std::fs::write(path("config.yml"), config).unwrap();
    let registry = Command::new("docker-registry")
        .args(["serve", &path("config.yml")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _registry = Registry(registry);
    for _ in 0..400 {
        if std::net::TcpStream::connect(&address).is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }

    let plain = Server::start();
    let source = plain.add("x", &Blobs::image(&[layer(&[("a", b"1")])], Packing::Gzip));
    let (from, to) = (
        format!("docker://{source}"),
        format!("docker://{address}/app:x"),
    );
    run(
        "skopeo",
        &[
            "copy",
            "--insecure-policy",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
            &from,
            &to,
        ],
    );

    let limits = Limits {
        attempts: 1,
        ..Limits::default()
    };
    let pull = |ca_files: Vec<std::path::PathBuf>| {
        let mut registries = RegistryConfig::default();
        let host = RegistryHost {
            plain_http: Some(false),
            ca_files,
            ..RegistryHost::default()
        };
        registries.hosts.insert(address.clone(), host);
        let options = PullOptions {
            registries,
            limits: limits.clone(),
            policy: PullPolicy::Always,
            ..PullOptions::default()
        };
        let store = Store::open(work.path().join("data")).unwrap();
        runtime().block_on(store.pull(
            &parse_reference(&format!("{address}/app:x")).unwrap(),
            &options,
        ))
    };
    let error = pull(Vec::new()).unwrap_err();
    assert!(matches!(error, Error::Registry { .. }), "{error:?}");
    assert_eq!(pull(vec![authority.into()]).unwrap().layers.len(), 1);
}
