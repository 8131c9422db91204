// Package conformance pins the tools of the conformance tests. critest is a test program, which no tool directive can
// name: what it imports is imported here, so that go.sum covers it.
package conformance

import (
	_ "github.com/onsi/ginkgo/v2"
	_ "github.com/onsi/gomega"
	_ "sigs.k8s.io/cri-tools/pkg/benchmark"
	_ "sigs.k8s.io/cri-tools/pkg/validate"
)
