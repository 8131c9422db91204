//! How connections end, and how the device goes on after a pause, a restore or a reset.

use super::*;

#[test]
fn host_half_close_all_data_precedes_shutdown_and_guest_may_go_on() {
    let (mut guest, mut host) = Guest::connected();
    let data = pattern(150_000);
    let mut written = 0;
    let mut got = Vec::new();
    let mut closed = false;
    let mut last;
    loop {
        if written < data.len() {
            written += host.write(&data[written..]).unwrap_or(0);
        } else if !closed {
            host.shutdown(Shutdown::Write).unwrap();
            closed = true;
        }
        let packets = guest.receive();
        got.extend(data_of(&packets));
        guest.credit(got.len() - guest.fwd_cnt as usize);
        last = packets.last().map(|(header, _)| (header.op, header.flags));
        if last == Some((op::SHUTDOWN, SHUTDOWN_SEND)) {
            break;
        }
    }
    assert!(got == data);

    guest.send(op::RW, 0, b"still here");
    let mut seen = Vec::new();
    read_available(&mut host, &mut seen);
    assert_eq!(seen, b"still here");

    guest.send(op::SHUTDOWN, SHUTDOWN_RECEIVE | SHUTDOWN_SEND, &[]);
    assert_eq!(guest.ops().last(), Some(&op::RST));
    assert!(read_available(&mut host, &mut seen));
    assert_eq!(guest.counter("open_connections"), 0);
}

#[test]
fn guest_half_close_host_reads_all_then_end_and_may_answer() {
    let (mut guest, mut host) = Guest::connected();
    let data = pattern(200_000);
    for chunk in data.chunks(50_000) {
        guest.send(op::RW, 0, chunk);
    }
    guest.send(op::SHUTDOWN, SHUTDOWN_SEND, &[]);

    let mut seen = Vec::new();
    while !read_available(&mut host, &mut seen) {
        guest.driver.settle(&mut guest.vsock);
    }
    assert!(seen == data);

    host.write_all(b"answer").unwrap();
    assert_eq!(data_of(&guest.receive()), b"answer");
    guest.send(op::RW, 0, b"x");
    assert_eq!(
        guest.ops(),
        [op::RST],
        "data after the end breaks the protocol"
    );
}

#[test]
fn guest_stops_reading_host_gets_broken_pipe() {
    let (mut guest, mut host) = Guest::connected();
    guest.send(op::SHUTDOWN, SHUTDOWN_RECEIVE, &[]);
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send(op::RW, 0, b"but sends");
    let mut seen = Vec::new();
    assert!(!read_available(&mut host, &mut seen));
    assert_eq!(seen, b"but sends");
}

#[test]
fn guest_close_with_data_held_is_acknowledged_and_all_is_delivered() {
    let (mut guest, mut host) = Guest::connected();
    let mut data = Vec::new();
    // More than the socket holds, so that some stays in the ring.
    while guest.may_send() > 100_000 {
        let chunk = pattern(40_000);
        guest.send(op::RW, 0, &chunk);
        data.extend(chunk);
        guest.receive();
    }
    guest.send(op::SHUTDOWN, SHUTDOWN_RECEIVE | SHUTDOWN_SEND, &[]);
    assert_eq!(
        guest.ops(),
        [op::RST],
        "the guest needn't wait for the reader"
    );
    assert_eq!(guest.counter("open_connections"), 1);

    let mut seen = Vec::new();
    while !read_available(&mut host, &mut seen) {
        guest.driver.settle(&mut guest.vsock);
    }
    assert!(seen == data);
    assert_eq!(guest.counter("open_connections"), 0);
}

#[test]
fn guest_reset_with_data_held_all_is_delivered() {
    let (mut guest, mut host) = Guest::connected();
    let mut data = Vec::new();
    while guest.may_send() > 100_000 {
        guest.send(op::RW, 0, &pattern(40_000));
        data.extend(pattern(40_000));
        guest.receive();
    }
    guest.send(op::RST, 0, &[]);
    assert!(guest.ops().is_empty());
    let mut seen = Vec::new();
    while !read_available(&mut host, &mut seen) {
        guest.driver.settle(&mut guest.vsock);
    }
    assert!(seen == data);
}

#[test]
fn guest_close_with_unread_input_host_sees_a_clean_end() {
    let (mut guest, mut host) = Guest::connected();
    guest.send(op::RW, 0, b"output");
    let _ = host.write(&pattern(200_000));
    guest.driver.settle(&mut guest.vsock);
    guest.send(op::SHUTDOWN, SHUTDOWN_RECEIVE | SHUTDOWN_SEND, &[]);
    let mut seen = Vec::new();
    assert!(read_available(&mut host, &mut seen), "no ECONNRESET");
    assert_eq!(seen, b"output");
}

#[test]
fn host_close_guest_gets_all_then_shutdown_both_ways() {
    let (mut guest, mut host) = Guest::connected();
    host.write_all(b"last words").unwrap();
    drop(host);

    let packets = guest.receive();
    assert_eq!(data_of(&packets), b"last words");
    let (last, _) = packets.last().unwrap();
    assert_eq!(
        (last.op, last.flags),
        (op::SHUTDOWN, SHUTDOWN_RECEIVE | SHUTDOWN_SEND)
    );
    guest.send(op::RW, 0, b"to nobody");
    guest.send(op::RST, 0, &[]);
    assert_eq!(guest.counter("open_connections"), 0);
}

#[test]
fn host_close_while_guest_has_no_credit_data_is_kept_for_it() {
    let (mut guest, mut host) = Guest::connected();
    let mut written = 0;
    let data = pattern(200_000);
    for _ in 0..100 {
        written += host.write(&data[written..]).unwrap_or(0);
        guest.driver.settle(&mut guest.vsock);
    }
    assert_eq!(written, data.len());
    drop(host);
    let mut got = data_of(&guest.receive());
    assert_eq!(got.len(), GUEST_ALLOC as usize);

    let mut ended = false;
    while !ended {
        guest.credit(got.len() - guest.fwd_cnt as usize);
        let packets = guest.receive();
        ended = packets.iter().any(|(header, _)| header.op == op::SHUTDOWN);
        got.extend(data_of(&packets));
    }
    assert!(got == data);
}

#[test]
fn host_stops_reading_guest_is_told_and_credit_still_flows() {
    let (mut guest, mut host) = Guest::connected();
    host.shutdown(Shutdown::Read).unwrap();
    for _ in 0..20 {
        guest.send(op::RW, 0, &pattern(60_000));
        guest.receive();
        assert!(guest.may_send() >= 60_000);
    }
    host.write_all(b"but writes").unwrap();
    assert_eq!(data_of(&guest.receive()), b"but writes");
    assert_eq!(guest.counter("violations"), 0);
}

#[test]
fn pause_and_resume_connection_goes_on() {
    let (mut guest, mut host) = Guest::connected();
    guest.send(op::RW, 0, b"one ");
    let queues = guest.vsock.stop();
    host.write_all(b"while paused").unwrap();
    assert!(!guest.driver.turn(&mut guest.vsock));

    let features = guest.vsock.features();
    guest
        .vsock
        .activate(guest.driver.reactivation(queues, features))
        .unwrap();
    assert_eq!(data_of(&guest.receive()), b"while paused");
    guest.send(op::RW, 0, b"two");
    let mut seen = Vec::new();
    read_available(&mut host, &mut seen);
    assert_eq!(seen, b"one two");
}

#[test]
fn restore_guest_is_told_of_the_reset_once_it_has_a_buffer() {
    let (mut guest, _host) = Guest::connected();
    let state = guest.vsock.save();
    let queues = guest.vsock.stop();
    guest.vsock = Vsock::restore(9, None, &state).unwrap();
    let features = guest.vsock.features();
    guest
        .vsock
        .activate(guest.driver.reactivation(queues, features))
        .unwrap();
    guest.driver.settle(&mut guest.vsock);

    let short = guest.driver.alloc_with(&[0xff; 2]);
    let address = guest.driver.alloc_with(&[0xff; 8]);
    guest.driver.queues[2].add(&[Desc::writable(short, 2)]);
    guest.driver.queues[2].add(&[Desc::writable(address, 8)]);
    guest.driver.queues[2].add(&[Desc::writable(address, 8)]);
    guest.driver.queues[2].kick();
    guest.driver.settle(&mut guest.vsock);

    let used = guest.driver.queues[2].take_used();
    assert_eq!(used.iter().map(|(_, len)| *len).collect::<Vec<_>>(), [0, 4]);
    assert_eq!(guest.driver.read(address, 4), [0; 4]);
    let mut cid = [0; 8];
    guest.vsock.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 9);
}

#[test]
fn restore_garbage_is_refused() {
    assert!(Vsock::restore(3, None, &serde_json::json!({"cid": "x"})).is_err());
}

#[test]
fn driver_reset_old_connections_are_forgotten() {
    let (mut guest, mut host) = Guest::connected();
    guest.vsock.stop();
    guest.driver = Driver::new(&guest.vsock);
    guest.driver.activate(&mut guest.vsock);
    guest.driver.settle(&mut guest.vsock);
    let mut seen = Vec::new();
    assert!(read_available(&mut host, &mut seen));
    assert_eq!(guest.counter("open_connections"), 0);
}

#[test]
fn drain_packets_in_queue_and_held_bytes_reach_a_slow_reader() {
    let (mut guest, host) = Guest::connected();
    let mut data = Vec::new();
    while guest.may_send() > 100_000 {
        guest.send(op::RW, 0, &pattern(40_000));
        data.extend(pattern(40_000));
        guest.receive();
    }
    // One more, which the device hasn't looked at.
    let header = Header {
        len: 1000,
        ..guest.header(op::RW)
    };
    let address = guest.driver.alloc_with(&header.bytes());
    let payload = guest.driver.alloc_with(&pattern(1000));
    guest.driver.queues[1].add(&[Desc::readable(address, 44), Desc::readable(payload, 1000)]);
    data.extend(pattern(1000));

    let reader = std::thread::spawn(move || {
        let mut host = host;
        host.set_nonblocking(false).unwrap();
        let mut seen = Vec::new();
        host.read_to_end(&mut seen).unwrap();
        seen
    });
    assert_eq!(guest.vsock.drain(Duration::from_secs(10)), 0);
    drop(guest);
    assert!(reader.join().unwrap() == data);
}

#[test]
fn drain_reader_that_never_reads_gives_up_in_time() {
    let (mut guest, _host) = Guest::connected();
    while guest.may_send() > 100_000 {
        guest.send(op::RW, 0, &pattern(40_000));
        guest.receive();
    }
    let start = Instant::now();
    assert!(guest.vsock.drain(Duration::from_millis(50)) > 0);
    assert!(start.elapsed() < Duration::from_secs(5));
}
