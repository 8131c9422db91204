//! Connections of the host's to servers that listen on the guest's loopback: a pod's port-forward.

use std::net::{Ipv4Addr, Ipv6Addr};

use tokio::net::TcpStream;

use crate::conn::Host;
use crate::error::{Attempt, Error, Kind, Result};

/// Connects the server at `port` with the host's stream at `stream_port`; bytes go both ways from then on.
pub(crate) async fn forward(host: &Host, port: u32, stream_port: u32) -> Result<()> {
    let number = u16::try_from(port).ok().filter(|port| *port != 0);
    let number = number.ok_or_else(|| Error::invalid(format!("{port} is not a port")))?;
    // First, whatever comes of the rest: the host offers the stream until it is taken.
    let stream = host.connect(stream_port).await;
    let mut stream = stream.attempt(|| "connect to the host's stream".into())?;
    let mut server = match TcpStream::connect((Ipv4Addr::LOCALHOST, number)).await {
        Ok(server) => server,
        Err(error) => match TcpStream::connect((Ipv6Addr::LOCALHOST, number)).await {
            Ok(server) => server,
            Err(_) => {
                let text = format!("nobody listens on port {port} of the loopback: {error}");
                return Err(Error::new(Kind::NotFound, text));
            }
        },
    };
    tokio::spawn(async move {
        // Either side may end it at any time.
        let _ = tokio::io::copy_bidirectional(&mut server, &mut stream).await;
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, UnixListener};

    #[tokio::test]
    async fn bytes_go_both_ways_and_half_a_close_through() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::Unix(dir.path().to_owned());
        let listener = UnixListener::bind(dir.path().join("7")).unwrap();
        let server = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.unwrap();
        let port = server.local_addr().unwrap().port();
        forward(&host, port.into(), 7).await.unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut served, _) = server.accept().await.unwrap();
        stream.write_all(b"question").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut question = String::new();
        served.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        served.write_all(b"answer").await.unwrap();
        drop(served);
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer");
    }

    #[tokio::test]
    async fn port_without_a_server_and_what_is_no_port_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::Unix(dir.path().to_owned());
        let _listener = UnixListener::bind(dir.path().join("7")).unwrap();
        let gone = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = gone.local_addr().unwrap().port();
        drop(gone);
        for (port, kind) in [
            (u32::from(port), Kind::NotFound),
            (0, Kind::Invalid),
            (65_536, Kind::Invalid),
        ] {
            assert_eq!(
                forward(&host, port, 7).await.unwrap_err().kind,
                kind,
                "{port}"
            );
        }
    }
}
