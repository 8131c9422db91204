//! UDP: sent back, sent without end, or sent and waited for.

use std::io;
use std::net::UdpSocket;
use std::process::ExitCode;
use std::time::Duration;

/// How long a reply is waited for before its packet is sent anew.
const PATIENCE: Duration = Duration::from_secs(2);
/// Packets sent anew in a row before nobody is there.
const ATTEMPTS: u32 = 30;
/// Bytes in a packet of a flood: as many as fit into one frame.
const FLOOD: usize = 1400;

/// Sends every packet back.
pub(crate) fn echo(port: &str) -> ExitCode {
    let serve = || -> io::Result<()> {
        let socket = UdpSocket::bind(("0.0.0.0", number(port)?))?;
        let mut buffer = [0; 2048];
        loop {
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        }
    };
    told(serve())
}

/// Sends packets as fast as they can be had, whoever listens.
pub(crate) fn flood(address: &str, port: &str) -> ExitCode {
    let send = || -> io::Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect((address, number(port)?))?;
        loop {
            // A port that nobody listens on answers with an error, which changes nothing.
            let _ = socket.send(&[b'x'; FLOOD]);
        }
    };
    told(send())
}

/// Sends so many small packets, each once the one before was answered.
pub(crate) fn ping(address: &str, port: &str, count: &str) -> ExitCode {
    let ping = || -> io::Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect((address, number(port)?))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        for trip in 0..number::<u32>(count)? {
            round_trip(&socket, trip)?;
        }
        Ok(())
    };
    told(ping())
}

fn round_trip(socket: &UdpSocket, trip: u32) -> io::Result<()> {
    let mut last = io::ErrorKind::TimedOut.into();
    for _ in 0..ATTEMPTS {
        let mut buffer = [0; 16];
        match socket
            .send(&trip.to_le_bytes())
            .and_then(|_| receive(socket, trip, &mut buffer))
        {
            Ok(()) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Takes the answer, and any late one to an earlier packet before it.
fn receive(socket: &UdpSocket, trip: u32, buffer: &mut [u8]) -> io::Result<()> {
    loop {
        let length = socket.recv(buffer)?;
        if buffer[..length] == trip.to_le_bytes() {
            return Ok(());
        }
    }
}

fn number<T: std::str::FromStr>(text: &str) -> io::Result<T> {
    let refused = |_| io::Error::other(format!("{text} is no number that fits here"));
    text.parse().map_err(refused)
}

fn told(result: io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
